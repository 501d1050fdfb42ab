//! `huskd tunnels`: starts [companions](crate::companion) for a daemon whose own container is replaced at every upgrade.
//!
//! When a container ends, everything that was started in it ends with it. So in Kubernetes the processes that carry tunnels run in
//! a container of their own, which no rolling update touches, and are started there when the daemon asks. All else stays
//! as on a host: the daemon finds, asks and ends them itself, which is why both containers see the host's processes.
//!
//! A connection is one request, a [`Job`], and one answer.

use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use husk_overlay::ipc::{read_message, write_message};
use husk_overlay::marks;
use tokio::net::UnixStream;

use crate::companion::{Job, OWN_PROGRAM, Process, START_PATIENCE, stop_signal};
use crate::{files, server};

/// How long asking may take.
const TIME_LIMIT: Duration = START_PATIENCE.saturating_mul(2);

/// What is served.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Run directory of the daemon
    #[arg(long, env = "HUSK_RUN_DIRECTORY", default_value = marks::RUN_DIRECTORY)]
    run_directory: PathBuf,
    /// Socket at which the daemon asks
    #[arg(long, env = "HUSK_TUNNELS", default_value = "/run/husk/tunnels.sock")]
    socket: PathBuf,
}

/// What is answered.
type Answer = Result<(), String>;

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When the socket cannot be made.
pub async fn run(options: Options) -> Result<()> {
    files::create_directory(&options.run_directory, 0o755)?;
    let listener =
        server::listen(&options.socket).with_context(|| format!("cannot listen on {}", options.socket.display()))?;
    let stop = stop_signal()?;
    tokio::pin!(stop);
    tracing::info!(socket = %options.socket.display(), "starts the processes that carry tunnels when the daemon asks");
    loop {
        tokio::select! {
            signal = &mut stop => {
                tracing::info!(signal, "stopping");
                return Ok(());
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let run_directory = options.run_directory.clone();
                    tokio::spawn(async move { serve(stream, &run_directory).await });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

/// Of two processes for one job the second finds the first one's lock, and ends.
async fn serve(stream: UnixStream, run_directory: &Path) {
    let served = async {
        let (stream, job) = receive(stream).await?;
        let started = start(&job, run_directory).await.map_err(|error| format!("{error:#}"));
        match &started {
            Ok(()) => tracing::info!("started the {job}"),
            Err(error) => tracing::error!(error, "cannot start the {job}"),
        }
        answer(stream, started).await
    };
    if let Err(error) = served.await {
        tracing::warn!(error = format!("{error:#}"), "a request was not served");
    }
}

async fn receive(stream: UnixStream) -> Result<(BlockingStream, Job)> {
    let mut stream = blocking(stream)?;
    let read = move || -> Result<(BlockingStream, Job)> {
        let job = read_message(&mut stream).context("the request is not understood")?;
        Ok((stream, job))
    };
    tokio::task::spawn_blocking(read).await?
}

async fn answer(mut stream: BlockingStream, answer: Answer) -> Result<()> {
    let write = move || write_message(&mut stream, &answer).context("the daemon took no answer");
    tokio::task::spawn_blocking(write).await?
}

fn blocking(stream: UnixStream) -> Result<BlockingStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TIME_LIMIT))?;
    stream.set_write_timeout(Some(TIME_LIMIT))?;
    Ok(stream)
}

async fn start(job: &Job, run_directory: &Path) -> Result<()> {
    let process = Process::new(job, run_directory);
    let mut child = process.spawn(Path::new(OWN_PROGRAM))?;
    process.wait_ready(&mut child, START_PATIENCE).await?;
    // Reaped when it ends.
    tokio::spawn(async move { child.wait().await });
    Ok(())
}

/// Has a companion started, and waits until it answers.
///
/// # Errors
/// When it does not start, or nobody is there who could start it.
pub(crate) fn ask_to_start(socket: &Path, job: &Job) -> Result<()> {
    let nobody = || {
        let socket = socket.display();
        format!(
            "nobody answers on {socket}, who would start the {job}; does the pod of the DaemonSet husk-tunnels run on this node?"
        )
    };
    let mut stream = BlockingStream::connect(socket).with_context(nobody)?;
    stream.set_read_timeout(Some(TIME_LIMIT))?;
    stream.set_write_timeout(Some(TIME_LIMIT))?;
    write_message(&mut stream, job).with_context(nobody)?;
    let answer: Answer = read_message(&mut stream).with_context(nobody)?;
    answer.map_err(|error| anyhow!("{error}"))
}

/// For tests: a listener as [`run`] has it.
#[cfg(test)]
async fn serve_all(listener: tokio::net::UnixListener, run_directory: PathBuf) {
    while let Ok((stream, _)) = listener.accept().await {
        serve(stream, &run_directory).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_there_is_an_error_that_names_the_daemonset() {
        let directory = tempfile::tempdir().unwrap();
        let job = Job::WireguardUserspace { interface: "husk-wg0".parse().unwrap() };
        let error = format!("{:#}", ask_to_start(&directory.path().join("tunnels.sock"), &job).unwrap_err());
        assert!(error.contains("husk-tunnels") && error.contains("husk-wg0"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_keeps_a_process_from_starting_reaches_the_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("tunnels.sock");
        let server = tokio::spawn(serve_all(server::listen(&socket).unwrap(), directory.path().to_owned()));
        // This program is no huskd: it ends at once with an error of its own.
        let job = Job::WireguardUserspace { interface: "husk-wg0".parse().unwrap() };
        let asked = tokio::task::spawn_blocking(move || ask_to_start(&socket, &job)).await.unwrap();
        let error = format!("{:#}", asked.unwrap_err());
        assert!(error.contains("userspace WireGuard process for husk-wg0"), "{error}");
        server.abort();
    }
}
