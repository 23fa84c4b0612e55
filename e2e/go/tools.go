//go:build tools

// Package tools names what the tests need of the Kubernetes project, so that go.mod and go.sum pin it.
package tools

import (
	// The API module, whose descriptors proto/cri is compared with.
	_ "k8s.io/cri-api/pkg/apis/runtime/v1"
	// crictl.
	_ "sigs.k8s.io/cri-tools/cmd/crictl"
	// critest: its command is a test package, which can't be imported; these are the packages it runs.
	_ "sigs.k8s.io/cri-tools/pkg/benchmark"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)
