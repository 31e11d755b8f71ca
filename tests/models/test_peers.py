"""The dense peers by name."""

import pytest
import torch
import torchvision

from mod_kernels import models

from .support import parameters


def test_every_network_has_one():
    assert list(models.PEERS) == models.list_models()
    assert all(callable(getattr(models, name)) and name in models.__all__ for name in models.list_models())


@pytest.mark.parametrize("name", models.list_models())
def test_it_is_torchvisions(name):
    with torch.device("meta"):
        peer = models.dense_peer(name, num_classes=7)
        expected = getattr(torchvision.models, models.PEERS[name][0])(num_classes=7)
    assert [(key, value.shape) for key, value in peer.state_dict().items()] == [
        (key, value.shape) for key, value in expected.state_dict().items()
    ]


def test_stem():
    with torch.device("meta"):
        peer = models.dense_peer("resnet18_mod", stem="cifar", num_classes=10)
        assert peer.layer1(peer.maxpool(peer.conv1(torch.empty(2, 3, 32, 32)))).shape == (2, 64, 32, 32)
        assert parameters(peer) < parameters(models.dense_peer("resnet18_mod", num_classes=10))
        for name in ("resnet18_mod", "vgg16_bn_mod"):
            with pytest.raises(ValueError, match="stem must be one of 'imagenet', 'cifar', got 'mnist'"):
                models.dense_peer(name, stem="mnist")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name must be one of resnet18_mod, .*, got 'resnet9_mod'"):
        models.dense_peer("resnet9_mod")
