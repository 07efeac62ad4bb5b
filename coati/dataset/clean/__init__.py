"""Cleaning of data sets: filters, deduplication, decontamination."""
