"""Placeholder while the chapters are being written."""
