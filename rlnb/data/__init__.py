"""What the methods learn from: data sets, preferences, annotators and how far they agree."""
