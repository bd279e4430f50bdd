"""Configs of Scenic runs."""
