"""The rules of the distributed run: events in, decisions out.

Standard library only: no clock, no thread, no torch, no Ray. The actors carry the decisions out.
"""
