"""The parameter server: owns parameters, momentum, damping, and the inverses in use."""
