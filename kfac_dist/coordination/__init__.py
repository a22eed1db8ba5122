"""The rules of a distributed run: they turn what is known into a decision.

Standard library only: no clock, no thread, no torch, no Ray. The actors, the driver and the
controller ask these rules and carry out what they decide. So each rule can be read and tested on
its own. The head of each module says which question it answers.

    jobs/    may a job start, what may happen to it, what is done about its attempts
    steps/   what is due in a step, on which cases, with which inverses, and who makes them
"""
