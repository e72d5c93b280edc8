//! A peer that does exactly what a script says, byte by byte.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// One thing that the peer does on a connection. After the last one it closes.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Reads one whole HTTP/1.1 request.
    ReadRequest,
    /// Reads this many bytes.
    Read(usize),
    /// Waits, so that what the other side sends has arrived.
    Wait(Duration),
    /// Writes bytes.
    Write(Vec<u8>),
    /// Resets the connection.
    Reset,
    /// Does nothing until the other side closes.
    Stall,
}

impl Step {
    /// Writes an HTTP/1.1 answer.
    pub(crate) fn answer(status: &str, headers: &[(&str, &str)], body: &str) -> Step {
        let mut text = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n", body.len());
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        Step::Write((text + "\r\n" + body).into_bytes())
    }
}

pub(crate) struct Scripted {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Scripted {
    /// Follows the first script on the first connection, and so on; the last
    /// one on all that follow.
    pub(crate) async fn start(scripts: Vec<Vec<Step>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn({
            let requests = requests.clone();
            async move {
                for number in 0.. {
                    let (stream, _) = listener.accept().await.unwrap();
                    let script = scripts[number.min(scripts.len() - 1)].clone();
                    tokio::spawn(follow(stream, script, requests.clone()));
                }
            }
        });
        Scripted {
            address,
            requests,
            task,
        }
    }

    /// Answers every request with the same.
    pub(crate) async fn answering(status: &str, headers: &[(&str, &str)], body: &str) -> Self {
        let answer = Step::answer(status, headers, body);
        Self::start(vec![vec![Step::ReadRequest, answer]]).await
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/data/foundation/import", self.address)
    }

    /// Every whole request so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(mut stream: TcpStream, script: Vec<Step>, requests: Arc<Mutex<Vec<String>>>) {
    for step in script {
        match step {
            Step::ReadRequest => match read_request(&mut stream).await {
                Some(request) => requests.lock().unwrap().push(request),
                None => return,
            },
            Step::Read(bytes) => {
                let _ = stream.read_exact(&mut vec![0; bytes]).await;
            }
            Step::Wait(time) => tokio::time::sleep(time).await,
            Step::Write(bytes) => {
                let _ = stream.write_all(&bytes).await;
            }
            Step::Reset => {
                stream.set_zero_linger().unwrap();
                return;
            }
            Step::Stall => {
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        }
    }
    let _ = stream.shutdown().await;
}

async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut text = Vec::new();
    loop {
        let read = String::from_utf8_lossy(&text).into_owned();
        if let Some((head, body)) = read.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .map_or(0, |length| length.parse().unwrap());
            if body.len() >= length {
                return Some(read);
            }
        }
        if stream.read_buf(&mut text).await.ok()? == 0 {
            return None;
        }
    }
}
