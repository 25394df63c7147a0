"""Runs: what was asked for, what happened, what is wrong with them."""
