"""Speed of decoding by shape: models with random weights cost what trained ones do, so any shape can be timed."""
