"""Other methods, distribution shifts and speed measurements."""
