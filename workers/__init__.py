"""The runtime: the driver and the three roles as Ray actors. Nothing else imports ray."""
