"""Figures, live curves and widgets."""
