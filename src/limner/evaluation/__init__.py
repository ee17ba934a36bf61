"""Figures on what was trained and drawn."""
