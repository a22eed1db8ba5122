"""The inverse worker: averages the factors of its layers and inverts them at its own pace."""
