//! Log lines: which are written, and that neither they nor who reads them can
//! hold the gateway up.

use std::{
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use aep_simulator::Simulator;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, ChildStderr},
    time::{sleep, timeout},
};
use tonic::Code;

use crate::support::{Client, Gateway, request, simulator};

const LONG: Duration = Duration::from_secs(20);
const LOST: &str = "aep_gateway_log_lines_lost_total ";

/// A gateway whose standard error nobody reads.
struct Unread {
    child: Child,
    stderr: Option<ChildStderr>,
    listen: String,
    admin: String,
}

impl Unread {
    async fn start(upstream: &Simulator) -> Self {
        let mut child = Gateway::command(&[
            "serve",
            "--listen=127.0.0.1:0",
            "--admin-listen=127.0.0.1:0",
            "--log-level=trace",
            "--upstream-url",
            &upstream.import_url(),
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).await.unwrap();
        let line: Value = serde_json::from_str(&line).unwrap();
        Unread {
            stderr: child.stderr.take(),
            child,
            listen: line["listen"].as_str().unwrap().to_owned(),
            admin: line["admin"].as_str().unwrap().to_owned(),
        }
    }

    /// Makes calls until lines are lost, and some more. All are answered.
    async fn lose_lines(&self) {
        let stream = TcpStream::connect(&self.listen).await.unwrap();
        let mut client = Client::over(stream).await.unwrap();
        for _ in 0..100 {
            for _ in 0..20 {
                assert_eq!(client.create().await.unwrap().code(), Code::Ok);
            }
            if self.lost().await > 0 {
                return;
            }
        }
        panic!("no line was lost");
    }

    async fn lost(&self) -> u64 {
        let url = format!("http://{}/metrics", self.admin);
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let page = client.get(url).send().await.unwrap().text().await.unwrap();
        let lost = page.lines().find_map(|line| line.strip_prefix(LOST));
        lost.unwrap().parse().unwrap()
    }

    fn terminate(&self) {
        let pid = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.unwrap().success());
    }
}

#[tokio::test]
async fn a_log_reader_that_stalls_stops_neither_calls_nor_the_end() {
    let upstream = simulator().await;
    let mut gateway = Unread::start(&upstream).await;
    gateway.lose_lines().await;
    gateway.terminate();
    let ended = timeout(LONG, gateway.child.wait()).await;
    assert!(ended.expect("it ends").unwrap().success());
}

#[tokio::test]
async fn lost_lines_are_told_when_the_reader_goes_on() {
    let upstream = simulator().await;
    let mut gateway = Unread::start(&upstream).await;
    gateway.lose_lines().await;
    let log = Arc::new(Mutex::new(Vec::new()));
    let mut stderr = BufReader::new(gateway.stderr.take().unwrap()).lines();
    let reading = tokio::spawn({
        let log = log.clone();
        async move {
            while let Some(line) = stderr.next_line().await.unwrap() {
                log.lock().unwrap().push(line);
            }
        }
    });
    let told = || -> u64 {
        let log = log.lock().unwrap();
        let told = log
            .iter()
            .filter(|line| line.contains("log lines were lost"));
        told.map(|line| serde_json::from_str::<Value>(line).unwrap()["lost"].as_u64())
            .sum::<Option<u64>>()
            .unwrap()
    };
    let all_told = async {
        while told() == 0 || told() != gateway.lost().await {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, all_told).await.expect("a line about it");
    gateway.terminate();
    assert!(gateway.child.wait().await.unwrap().success());
    timeout(LONG, reading).await.unwrap().unwrap();
    let log = log.lock().unwrap();
    for line in log.iter() {
        assert!(line.len() < 4096, "{line}");
        let line = serde_json::from_str::<Value>(line);
        assert!(line.unwrap().is_object());
    }
    let stopped = |line: &&String| line.contains(r#""message":"stopped""#);
    assert_eq!(log.iter().filter(stopped).count(), 1);
}

#[tokio::test]
async fn a_filter_that_is_none_is_refused() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    let url = format!("http://{}/log-level", gateway.admin);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    // This one took 12 s and 865 MB.
    let automaton = r"[s{f=(((\w{9}){9}){9}){9}}]=trace";
    for filter in ["warning", "inof", "", "info,h2", "h2=loud", automaton] {
        let answer = client.put(&url).body(filter).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 400, "{filter}");
        assert_eq!(gateway.page("/log-level").await.1, "info\n");
        let flag = format!("--log-level={filter}");
        let output = Gateway::command(&["serve", &flag]).output().await.unwrap();
        assert_eq!(output.status.code(), Some(2), "{filter}");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains("--log-level"), "{told}");
    }
}

#[tokio::test]
async fn a_peer_cannot_fill_the_log_with_the_lines_of_a_library() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    let ping = |ack: u8, last: u8| [0, 0, 8, 6, ack, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    let mut peer = TcpStream::connect(&gateway.listen).await.unwrap();
    let acks = ping(1, 7).repeat(5000); // of pings that were never sent
    let bytes = [PREFACE, SETTINGS, &acks, &ping(0, 9)].concat();
    peer.write_all(&bytes).await.unwrap();
    let answered = async {
        let mut answers = Vec::new();
        while !answers.windows(17).any(|frame| *frame == ping(1, 9)) {
            assert_ne!(peer.read_buf(&mut answers).await.unwrap(), 0);
        }
    };
    timeout(LONG, answered).await.expect("all was read");
    gateway.create(request()).await.unwrap();
    gateway.logs("call ended").await;
    assert_eq!(gateway.log().lines().count(), 1, "{}", gateway.log());
}
