"""What the methods learn from: data sets, preferences and annotators."""
