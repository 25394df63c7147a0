"""What maintainers and the command line need, and no lesson."""
