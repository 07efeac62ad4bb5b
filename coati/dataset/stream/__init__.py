"""Rows that are read and tokenized while a run trains on them (``--streaming``).

``row_sources`` are the files, ``source_order`` the order of their rows, ``row_stream`` makes
windows of training rows, ``stream_loader`` cuts them into global batches.
"""
