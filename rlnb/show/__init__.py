"""Figures, live curves and widgets. Importing any of it turns live curves on in a notebook."""

from rlnb.show import live  # noqa: F401
