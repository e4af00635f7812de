"""The shop: the example application, writing through the log or dually."""
