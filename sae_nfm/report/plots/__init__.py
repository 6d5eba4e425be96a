"""Dot plots and the style that all figures share; they draw and compute nothing."""
