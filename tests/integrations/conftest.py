"""The libraries of the extra `integrations`; tests are skipped where one is missing."""

from tests.integrations.hidden import hide_torchvision_if_broken

hide_torchvision_if_broken()
