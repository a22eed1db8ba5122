"""K-FAC with models and training loops of other libraries, which the extra `integrations` installs.

Each module is named after its library and imports it; nothing else here does.
"""
