"""The stages of a build and the pipeline that runs them."""
