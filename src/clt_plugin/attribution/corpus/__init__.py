"""Beyond the prompt: what features do over a data set."""
