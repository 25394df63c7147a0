"""What the command line is made of: set-up, notebooks, the comparison, pretraining, a look at the machine."""
