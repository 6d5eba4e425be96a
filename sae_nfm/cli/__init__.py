"""Running one command of `sae-nfm`."""
