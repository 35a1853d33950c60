"""Plots, for people who would rather look."""

from clt_plugin.report.features import plot_features

__all__ = ["plot_features"]
