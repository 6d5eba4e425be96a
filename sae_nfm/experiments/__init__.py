"""The experiments of the paper, each with the controls it needs."""
