//! A TCP stream that can be told to fail.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// What is to happen to one connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Connection(Arc<Directives>);

#[derive(Debug, Default)]
struct Directives {
    reset: AtomicBool,
    reset_on_next_request: AtomicBool,
}

impl Connection {
    /// The connection is reset when it is next used.
    pub(super) fn reset(&self) {
        self.0.reset.store(true, Ordering::Release);
    }

    /// The connection is reset when the client next sends something.
    pub(super) fn reset_on_next_request(&self) {
        self.0.reset_on_next_request.store(true, Ordering::Release);
    }

    fn is_reset(&self) -> bool {
        self.0.reset.load(Ordering::Acquire)
    }
}

/// Resets a connection at once.
pub(super) fn reset(stream: TcpStream) {
    let _ = stream.set_zero_linger();
}

/// Wraps a stream that obeys its [`Connection`].
#[derive(Debug)]
pub(super) struct FaultyStream {
    stream: TcpStream,
    connection: Connection,
}

impl FaultyStream {
    pub(super) fn new(stream: TcpStream, connection: Connection) -> Self {
        FaultyStream { stream, connection }
    }

    fn check(&self) -> io::Result<()> {
        match self.connection.is_reset() {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => Ok(()),
        }
    }
}

impl Drop for FaultyStream {
    fn drop(&mut self) {
        if self.connection.is_reset() {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for FaultyStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let directives = &self.connection.0;
        if buffer.filled().len() > before
            && directives.reset_on_next_request.load(Ordering::Acquire)
        {
            self.connection.reset();
        }
        Poll::Ready(self.check())
    }
}

impl AsyncWrite for FaultyStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
