"""The control plane: it stores jobs, answers requests about them, and runs them on a cluster.

    cli, Client ──gRPC──▶ server ──▶ jobs ──▶ store
                                      ▲
                 control (the loop) ──┘──▶ a JobRunner, which is the cluster

It imports neither Ray nor torch: it reaches a cluster only by the protocol `JobRunner`.
"""
