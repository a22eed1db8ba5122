"""The runtime: Ray actors, the training loop and its launch. The only importer of ray."""
