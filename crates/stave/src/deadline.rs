//! A client's deadline, by gRPC's `grpc-timeout` (PROTOCOL-HTTP2.md).
//!
//! tonic keeps it as well, but answers CANCELLED, which wins where the client's own clock is the later one. This is inside of
//! tonic's, whose clock starts after and is looked at last.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

/// Makes a service answer DEADLINE_EXCEEDED when its client's time is over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines;

impl<S> Layer<S> for Deadlines {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline(inner)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Deadline<S>(S);

impl<S> Service<Request<Body>> for Deadline<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let header = request.headers().get("grpc-timeout").and_then(|value| value.to_str().ok());
        let over = header.and_then(parse).map(|limit| (limit, tokio::time::sleep(limit)));
        let answer = self.0.call(request);
        Box::pin(async move {
            let Some((limit, over)) = over else { return answer.await };
            tokio::select! {
                biased;
                answer = answer => answer,
                () = over => Ok(Status::deadline_exceeded(format!("the client's time of {limit:?} is over")).into_http()),
            }
        })
    }
}

/// At most eight digits, and a unit. What is none is no deadline, as for tonic.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never answers.
    #[derive(Clone)]
    struct Silent;

    impl Service<Request<Body>> for Silent {
        type Response = Response<Body>;
        type Error = std::convert::Infallible;
        type Future = std::future::Pending<Result<Response<Body>, Self::Error>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            std::future::pending()
        }
    }

    #[tokio::test]
    async fn it_is_told_as_what_it_is() {
        let request = Request::builder().header("grpc-timeout", "1000u").body(Body::empty()).unwrap();
        let answer = Deadlines.layer(Silent).call(request).await.unwrap();
        let status = Status::from_header_map(answer.headers()).unwrap();
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status:?}");
        let without = Deadlines.layer(Silent).call(Request::new(Body::empty()));
        assert!(tokio::time::timeout(Duration::from_millis(20), without).await.is_err());
    }

    #[test]
    fn times() {
        for (text, wanted) in [
            ("2H", Some(Duration::from_secs(7200))),
            ("3M", Some(Duration::from_secs(180))),
            ("4S", Some(Duration::from_secs(4))),
            ("5m", Some(Duration::from_millis(5))),
            ("99999999u", Some(Duration::from_micros(99_999_999))),
            ("6n", Some(Duration::from_nanos(6))),
            ("", None),
            ("S", None),
            ("1", None),
            ("1x", None),
            ("-1S", None),
            ("123456789S", None),
            ("1é", None),
        ] {
            assert_eq!(parse(text), wanted, "{text:?}");
        }
    }
}
