"""What was learnt: spectra of features, pictures, and the theory's graph."""
