//! The server's side of a SPDY connection: one task reads, one writes.

use std::{collections::VecDeque, io, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    select,
    sync::mpsc,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::debug;

use super::{
    Decoder, Encoder, Frame, FrameError, Headers,
    frame::{data_head, goaway, reset},
    streams::Streams,
};
use crate::{
    backlog::{Budget, Credits, Feed},
    link::{Activity, Channel, GoneGuard, Link, Outbound, Outgoing, QUEUE},
    socket::Hangup,
};

/// Bytes read at a time.
const READ: usize = 64 * 1024;
/// The connection's window of SPDY/3.1.
const CONNECTION_WINDOW: usize = 64 * 1024;
/// Answers (SYN_REPLY, RST_STREAM, PING) that may wait; then the connection isn't read on.
const ANSWERS: usize = 256;
/// Bytes gathered for one write.
const BATCH: usize = 256 * 1024;
/// Slices of one write; Linux takes 1024.
const SLICES: usize = 64;

/// A stream that the client has opened and that is answered.
pub(crate) struct NewStream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    pub(crate) channel: Channel,
}

/// A running connection.
pub(crate) struct Connection {
    /// The streams, as the client opens them.
    pub(crate) streams: mpsc::UnboundedReceiver<NewStream>,
    pub(crate) link: Link,
}

/// Which streams are taken.
pub(crate) struct Accept {
    /// Streams that may be open at a time.
    pub(crate) limit: usize,
    /// Whether the headers are of a stream that the protocol knows; others are reset.
    pub(crate) check: fn(&Headers) -> bool,
    /// A stream whose client ignores its window, and of which nobody takes a byte for so long while the connection waits for
    /// it, is reset, so that the others go on. `None`: it is waited for.
    pub(crate) stalled: Option<Duration>,
}

/// Starts to serve. Nothing is sent before the client's first frame: Go's client drops what arrives together with the
/// answer to its upgrade.
pub(crate) fn start<R, W>(reader: R, writer: W, hangup: Hangup, accept: Accept) -> Connection
where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    let (queue, outgoing) = mpsc::channel(QUEUE);
    let (answers, answer_queue) = mpsc::channel(ANSWERS);
    let (new_streams, streams) = mpsc::unbounded_channel();
    let table = Streams::default();
    let activity = Activity::new();
    let gone = CancellationToken::new();
    let credits = Credits::default();

    let read = Reader {
        streams: table.clone(),
        accept,
        credits: credits.clone(),
        received: 0,
        answers: answers.clone(),
        queue: queue.clone(),
        new_streams,
        activity: activity.clone(),
        budget: Budget::new(),
        next_id: 1,
        going_away: false,
    };
    let mut write = Writer {
        io: writer,
        encoder: Encoder::default(),
        credits,
        streams: table.clone(),
        activity: activity.clone(),
        head: BytesMut::new(),
        segments: VecDeque::new(),
        queued: 0,
    };
    let guard = GoneGuard(gone.clone());
    let reading = tokio::spawn(async move {
        let _guard = guard;
        let clear = table.clone();
        select! {
            result = read.run(reader, hangup) => {
                if let Err(error) = result {
                    debug!(%error, "SPDY connection ended");
                    // The writer ends after this; the client may not read it.
                    let told = async {
                        let _ = answers.send(Frame::GoAway { last: 0, status: goaway::PROTOCOL_ERROR }).await;
                        answers.closed().await;
                    };
                    let _ = timeout(Duration::from_secs(1), told).await;
                }
            }
            () = answers.closed() => {}
        }
        clear.clear();
    });
    let guard = GoneGuard(gone.clone());
    let writing = tokio::spawn(async move {
        let _guard = guard;
        if let Err(error) = write.run(answer_queue, outgoing).await {
            debug!(%error, "SPDY connection is broken");
        }
    });
    let tasks = vec![AbortOnDropHandle::new(reading), AbortOnDropHandle::new(writing)];
    Connection { streams, link: Link::new(gone, activity, queue, tasks) }
}

/// Why reading ended.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the client gave the connection a window over 2^31 - 1")]
    Window,
}

struct Reader {
    streams: Streams,
    accept: Accept,
    credits: Credits,
    /// Bytes of data since the connection's window was renewed.
    received: usize,
    answers: mpsc::Sender<Frame>,
    queue: mpsc::Sender<Outgoing>,
    new_streams: mpsc::UnboundedSender<NewStream>,
    activity: Activity,
    budget: Budget,
    next_id: u32,
    going_away: bool,
}

impl Reader {
    async fn run<R: AsyncRead + Unpin>(mut self, mut io: R, hangup: Hangup) -> Result<(), ReadError> {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::with_capacity(READ);
        loop {
            while let Some(frame) = decoder.decode(&mut buffer)? {
                // A frame may have to wait: its stream's backlog or the queue of answers is full. A client that goes
                // away meanwhile is only seen this way.
                select! {
                    biased;
                    result = self.handle(frame) => result?,
                    () = hangup.wait() => return Ok(()),
                }
            }
            buffer.reserve(READ);
            if io.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            self.activity.touch();
        }
    }

    async fn handle(&mut self, frame: Frame) -> Result<(), ReadError> {
        match frame {
            Frame::Data { id, fin, bytes } => {
                self.received += bytes.len();
                if self.received >= CONNECTION_WINDOW / 2 {
                    // It is as large as what has come: the streams have windows of their own.
                    self.credits.add(0, std::mem::take(&mut self.received));
                }
                if let Some(feed) = self.streams.feed(id)
                    && !bytes.is_empty()
                {
                    self.push(&feed, bytes).await;
                }
                if fin {
                    self.streams.remote_done(id);
                }
            }
            Frame::SynStream { id, fin, headers } => self.open(id, fin, headers).await,
            Frame::Reset { id, .. } => {
                self.streams.remove(id);
            }
            // An odd id is the client's own ping, an even one the answer to a ping of ours.
            Frame::Ping { id } if id % 2 == 1 => self.answer(Frame::Ping { id }).await,
            Frame::GoAway { .. } => self.going_away = true,
            Frame::Settings { initial_window: Some(bytes) } => self.streams.set_initial_window(bytes),
            Frame::WindowUpdate { id, delta } => {
                if self.streams.widen(id, delta).is_err() {
                    if id == 0 {
                        return Err(ReadError::Window);
                    }
                    self.streams.remove(id);
                    self.answer(Frame::Reset { id, status: reset::FLOW_CONTROL_ERROR }).await;
                }
            }
            Frame::SynReply { .. } | Frame::Headers { .. } | Frame::Settings { .. } | Frame::Ping { .. } => {}
        }
        Ok(())
    }

    /// Waits for room. What stands in the way for too long is reset.
    async fn push(&self, feed: &Feed, bytes: Bytes) {
        let Some(limit) = self.accept.stalled else { return feed.push(bytes).await };
        // A push that is given up has added nothing.
        while timeout(limit, feed.push(bytes.clone())).await.is_err() {
            for id in self.streams.stalled(limit) {
                debug!(stream = id, "nobody takes what came on a SPDY stream, which is reset");
                self.streams.remove(id);
                self.answer(Frame::Reset { id, status: reset::FLOW_CONTROL_ERROR }).await;
            }
        }
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) {
        let refused = if id < self.next_id {
            Some(reset::PROTOCOL_ERROR)
        } else {
            self.next_id = id.saturating_add(2);
            if self.going_away || self.streams.len() >= self.accept.limit {
                Some(reset::REFUSED_STREAM)
            } else if self.new_streams.is_closed() || !(self.accept.check)(&headers) {
                Some(reset::CANCEL)
            } else {
                None
            }
        };
        if let Some(status) = refused {
            return self.answer(Frame::Reset { id, status }).await;
        }
        let (feed, inbound, window) = self.budget.backlog_of(id, self.credits.clone());
        let cancelled = CancellationToken::new();
        let send_window = self.streams.add(id, feed, cancelled.clone());
        let outbound = Outbound::with_window(id, self.queue.clone(), send_window);
        let channel = Channel { inbound, outbound, reset: cancelled };
        if fin {
            self.streams.remote_done(id);
        }
        // The answer is queued before the session knows of the stream, so it precedes the stream's first data.
        self.answer(Frame::SynReply { id, fin: false, headers: Headers::default() }).await;
        if window > 0 && !fin {
            self.answer(Frame::WindowUpdate { id, delta: window }).await;
        }
        let _ = self.new_streams.send(NewStream { id, headers, channel });
    }

    async fn answer(&self, frame: Frame) {
        // The writer's end closes the connection by itself.
        let _ = self.answers.send(frame).await;
    }
}

struct Writer<W> {
    io: W,
    encoder: Encoder,
    credits: Credits,
    streams: Streams,
    activity: Activity,
    head: BytesMut,
    segments: VecDeque<Bytes>,
    queued: usize,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    async fn run(
        &mut self,
        mut answers: mpsc::Receiver<Frame>,
        mut outgoing: mpsc::Receiver<Outgoing>,
    ) -> io::Result<()> {
        let mut closing = false;
        while !closing {
            let mut item = select! {
                biased;
                answer = answers.recv() => match answer {
                    Some(frame) => {
                        closing |= self.queue_frame(&frame)?;
                        None
                    }
                    None => return Ok(()),
                },
                Some(item) = outgoing.recv() => Some(item),
                () = self.credits.ready() => None,
            };
            for (id, delta) in self.credits.take() {
                if id == 0 || self.streams.feed(id).is_some() {
                    self.queue_frame(&Frame::WindowUpdate { id, delta })?;
                }
            }
            while !closing && self.queued < BATCH {
                // Answers go first: a ping isn't kept waiting by data, and no stream's data precedes its SYN_REPLY.
                while let Ok(frame) = answers.try_recv() {
                    closing |= self.queue_frame(&frame)?;
                }
                match item.take() {
                    Some(item) => closing |= self.queue_outgoing(item)?,
                    None => match outgoing.try_recv() {
                        Ok(next) => item = Some(next),
                        Err(_) => break,
                    },
                }
            }
            self.flush().await?;
        }
        self.io.shutdown().await
    }

    fn queue_frame(&mut self, frame: &Frame) -> io::Result<bool> {
        self.encoder.encode(frame, &mut self.head).map_err(io::Error::other)?;
        self.seal_head();
        Ok(matches!(frame, Frame::GoAway { .. }))
    }

    /// Answers whether this was the last.
    fn queue_outgoing(&mut self, item: Outgoing) -> io::Result<bool> {
        match item {
            Outgoing::Data { channel, bytes } => {
                if self.streams.writable(channel) && !bytes.is_empty() {
                    data_head(channel, false, bytes.len(), &mut self.head);
                    self.seal_head();
                    self.queued += bytes.len();
                    self.segments.push_back(bytes);
                } else if !bytes.is_empty() {
                    self.streams.unsent(bytes.len());
                }
            }
            Outgoing::End { channel } => {
                if self.streams.writable(channel) {
                    data_head(channel, true, 0, &mut self.head);
                    self.seal_head();
                    self.streams.local_done(channel);
                }
            }
            Outgoing::Reset { channel } => {
                if self.streams.remove(channel) {
                    self.queue_frame(&Frame::Reset { id: channel, status: reset::CANCEL })?;
                }
            }
            Outgoing::Finished => {}
            Outgoing::Close => return self.queue_frame(&Frame::GoAway { last: 0, status: goaway::OK }),
        }
        Ok(false)
    }

    fn seal_head(&mut self) {
        self.queued += self.head.len();
        self.segments.push_back(self.head.split().freeze());
    }

    async fn flush(&mut self) -> io::Result<()> {
        if !self.io.is_write_vectored() && self.segments.len() > 1 {
            // Each write would become a message of its own.
            let mut whole = BytesMut::with_capacity(self.queued);
            self.segments.drain(..).for_each(|segment| whole.extend_from_slice(&segment));
            self.segments.push_back(whole.freeze());
        }
        while !self.segments.is_empty() {
            let slices: Vec<_> =
                self.segments.iter().take(SLICES).map(|segment| io::IoSlice::new(segment)).collect();
            let mut written = self.io.write_vectored(&slices).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            while let Some(front) = self.segments.front_mut() {
                if written < front.len() {
                    front.advance(written);
                    break;
                }
                written -= front.len();
                self.segments.pop_front();
            }
            self.activity.touch();
        }
        self.queued = 0;
        self.io.flush().await
    }
}
