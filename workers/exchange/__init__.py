"""The data that travels between the processes of a job, and how it travels."""
