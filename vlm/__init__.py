from vlm.compat import cure_torchvision
cure_torchvision()
