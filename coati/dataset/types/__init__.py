"""One module for each type of data; the table of them is :mod:`coati.dataset.data_types`."""
