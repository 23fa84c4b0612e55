// SPDX-License-Identifier: Apache-2.0

// Command go prints runtime.v1 of k8s.io/cri-api as a serialised FileDescriptorProto.
package main

import (
	"fmt"
	"os"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	file := (&v1.VersionRequest{}).ProtoReflect().Descriptor().ParentFile()
	bytes, err := proto.Marshal(protodesc.ToFileDescriptorProto(file))
	if err == nil {
		_, err = os.Stdout.Write(bytes)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
