"""Making, keeping and ending links, in the loop's thread."""
