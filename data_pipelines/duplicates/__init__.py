"""Documents that are the same or nearly so, found in files and in bounded memory."""
