"""What is not needed to understand HMR: experiments, benches, data sets."""
