"""The pieces that pages are made of, one a file; each is a plain function of a run, so a test can call it without a browser."""
