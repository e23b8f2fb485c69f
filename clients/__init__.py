"""The Flower ClientApp: local training and evaluation on one private partition."""
