"""One offline page from saved results."""
