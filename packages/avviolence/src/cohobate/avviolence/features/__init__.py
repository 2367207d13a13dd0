"""From raw video to features on one time grid: decoding, VGGish log-mel, extractors, extraction."""
