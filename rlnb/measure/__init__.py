"""What a model can do, how far it has moved, and how sure that is."""
