// client drives the streaming server as kubectl does.
//
//	client exec spdy|websocket URL STREAMS [WIDTHxHEIGHT]   STREAMS of i, o, e, t: stdin, stdout, stderr, tty
//	client forward spdy|websocket URL PORT                  prints the local port; ends with its stdin
//
// exec exits with the command's exit code, and with 250 on any other error.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
)

const failed = 250

func main() {
	if len(os.Args) < 5 {
		fail(errors.New("usage: see the source"))
	}
	target, err := url.Parse(os.Args[3])
	if err != nil {
		fail(err)
	}
	config := &rest.Config{Host: target.Scheme + "://" + target.Host}
	switch os.Args[1] {
	case "exec":
		err = execute(config, os.Args[2], target, os.Args[4], os.Args[5:])
	case "forward":
		err = forward(config, os.Args[2], target, os.Args[4])
	default:
		err = fmt.Errorf("unknown verb %q", os.Args[1])
	}
	var exit utilexec.CodeExitError
	if errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, exit)
		os.Exit(exit.Code)
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintf(os.Stderr, "client: %v\n", err)
	os.Exit(failed)
}

// oneSize is a terminal that never changes.
type oneSize struct{ sizes chan *remotecommand.TerminalSize }

func (s oneSize) Next() *remotecommand.TerminalSize { return <-s.sizes }

func execute(config *rest.Config, transport string, target *url.URL, streams string, rest []string) error {
	var executor remotecommand.Executor
	var err error
	if transport == "spdy" {
		executor, err = remotecommand.NewSPDYExecutor(config, http.MethodPost, target)
	} else {
		executor, err = remotecommand.NewWebSocketExecutor(config, http.MethodGet, target.String())
	}
	if err != nil {
		return err
	}
	options := remotecommand.StreamOptions{Tty: strings.Contains(streams, "t")}
	if strings.Contains(streams, "i") {
		options.Stdin = os.Stdin
	}
	if strings.Contains(streams, "o") {
		options.Stdout = os.Stdout
	}
	if strings.Contains(streams, "e") {
		options.Stderr = os.Stderr
	}
	if len(rest) > 0 {
		size := &remotecommand.TerminalSize{}
		if _, err := fmt.Sscanf(rest[0], "%dx%d", &size.Width, &size.Height); err != nil {
			return err
		}
		sizes := make(chan *remotecommand.TerminalSize, 1)
		sizes <- size
		options.TerminalSizeQueue = oneSize{sizes}
	}
	return executor.StreamWithContext(context.Background(), options)
}

func forward(config *rest.Config, transport string, target *url.URL, port string) error {
	tripper, upgrader, err := spdy.RoundTripperFor(config)
	if err != nil {
		return err
	}
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: tripper}, http.MethodPost, target)
	if transport == "websocket" {
		if dialer, err = portforward.NewSPDYOverWebsocketDialer(target, config); err != nil {
			return err
		}
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{"0:" + port}, stop, ready, io.Discard, os.Stderr)
	if err != nil {
		return err
	}
	go func() {
		<-ready
		ports, err := forwarder.GetPorts()
		if err != nil {
			fail(err)
		}
		fmt.Println(ports[0].Local)
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	return forwarder.ForwardPorts()
}
