from hypothesis import settings

# A shared machine is no reason for a property to fail, and CI tries the same examples each time.
settings.register_profile("coordination", deadline=None, derandomize=True)
settings.load_profile("coordination")
