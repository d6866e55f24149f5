package org.tscores;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpMessage;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.lang.reflect.Field;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.servingsdk.Context;
import org.pytorch.serve.servingsdk.ModelServerEndpoint;
import org.pytorch.serve.servingsdk.ModelServerEndpointException;
import org.pytorch.serve.servingsdk.annotations.Endpoint;
import org.pytorch.serve.servingsdk.annotations.helpers.EndpointTypes;
import org.pytorch.serve.servingsdk.http.Request;
import org.pytorch.serve.servingsdk.http.Response;
import org.pytorch.serve.util.ConfigManager;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * The door into TorchServe's frontend. Constructed before any model loads, it replaces TorchServe's own CPU launcher by
 * ours; later it answers GET /cores. Every decision is made in Python, by ts_plugin.frontend.server:
 * this class asks and obeys.
 *
 * <p>Source: org.pytorch.serve.servingsdk.impl.PluginsManager (one instance per endpoint type), ConfigManager.
 */
@Endpoint(
        urlPattern = "cores",
        endpointType = EndpointTypes.MANAGEMENT,
        description = "Which worker owns which cores; JSON, or a live page for Accept: text/html or ?format=html.")
public final class CoresEndpoint extends ModelServerEndpoint {
    private static final Logger logger = LoggerFactory.getLogger(CoresEndpoint.class);
    private static final String ENABLE = "cpu_launcher_enable";
    /** Our value of cpu_launcher_enable: not true for TorchServe, and in a snapshot it still says what was asked for. */
    private static final String TAKEN_OVER = "ts-cores";

    private static final String NOTHING = "{\"enabled\": false, \"slices\": [], \"unbound\": []}";
    private static final int TAKE_OVER_SECONDS = 30;
    private static final int LOOK_MILLISECONDS = 500;
    private static final int LONGEST_PAUSE_SECONDS = 30;
    private static final int ANSWER_SECONDS = 10;

    /** The interpreter that the server was configured with; null until the first instance has looked. */
    private static String python;

    private static boolean enabled;

    public CoresEndpoint() {
        synchronized (CoresEndpoint.class) {
            if (python == null) {
                ConfigManager config = ConfigManager.getInstance();
                python = config.getPythonExecutable();
                if (config.isCPULauncherEnabled() || TAKEN_OVER.equals(config.getProperty(ENABLE, ""))) {
                    config.setProperty(ENABLE, TAKEN_OVER);
                    takeOver(config);
                }
            }
        }
    }

    /** Points TorchServe at our launcher. Whatever goes wrong, the server serves: unbound, and the log says why. */
    private static void takeOver(ConfigManager config) {
        String args = config.getCPULauncherArgs() == null ? "" : config.getCPULauncherArgs();
        try {
            String answer = ask(TAKE_OVER_SECONDS, "takeover", "--launcher-args=" + args);
            JsonObject verdict = JsonParser.parseString(answer).getAsJsonObject();
            String launcher = verdict.get("python").getAsString();
            JsonArray warnings = verdict.getAsJsonArray("warnings");
            for (JsonElement warning : warnings) {
                logger.error("ts-cores: {}", warning.getAsString());
            }
            config.setProperty("python", launcher);
            enabled = true;
            if (verdict.has("mark")) {
                File mark = new File(verdict.get("mark").getAsString());
                List<String> question = new ArrayList<>();
                verdict.getAsJsonArray("register").forEach(word -> question.add(word.getAsString()));
                start(() -> stayRegistered(mark, question.toArray(new String[0])));
            }
            start(() -> DrainingWorkLoadManager.install()); // a lambda: a class that does not link fails there, not here
            logger.info("ts-cores: every worker gets its own cores; see GET /cores on the management API");
        } catch (Exception e) {
            if (e instanceof InterruptedException) {
                Thread.currentThread().interrupt();
            }
            logger.error("ts-cores: workers are served unbound: {}", reason(e));
        }
    }

    /**
     * Enters this server into the ledger again whenever its mark is gone: the state directory was deleted, or a worker did
     * not find its server there. The question to ask then is the one that the take-over answered.
     */
    private static void stayRegistered(File mark, String[] question) {
        int pause = 1;
        try {
            while (true) {
                TimeUnit.MILLISECONDS.sleep(LOOK_MILLISECONDS);
                if (mark.exists()) {
                    pause = 1;
                    continue;
                }
                try {
                    ask(TAKE_OVER_SECONDS, question);
                    logger.warn("ts-cores: {} was gone; registered this server there again", mark);
                } catch (IOException | RuntimeException e) {
                    logger.error("ts-cores: cannot register this server, again in {} s: {}", pause, reason(e));
                    TimeUnit.SECONDS.sleep(pause);
                    pause = Math.min(2 * pause, LONGEST_PAUSE_SECONDS);
                }
            }
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }

    @Override
    public void doGet(Request request, Response response, Context context) throws IOException {
        boolean html = wantsHtml(request);
        List<String> question = new ArrayList<>(List.of("cores"));
        if (enabled) {
            question.add("--enabled");
        }
        if (html) {
            question.add("--html");
        }
        String answer;
        try {
            answer = ask(ANSWER_SECONDS, question.toArray(new String[0]));
        } catch (InterruptedException | IOException | RuntimeException e) {
            if (enabled) {
                throw new ModelServerEndpointException("cannot read the core map: " + reason(e), e);
            }
            html = false;
            answer = NOTHING;
        }
        response.setContentType(html ? "text/html; charset=utf-8" : "application/json");
        response.setHeader("Vary", "Accept");
        response.getOutputStream().write(answer.getBytes(StandardCharsets.UTF_8));
    }

    /**
     * The parameter "format" decides, else the header Accept. The SDK's Request tells the names of the headers but not
     * their values, so Accept is read from the private netty request in it; where that fails, the answer is JSON.
     */
    private static boolean wantsHtml(Request request) {
        List<String> format = request.getParameter("format");
        if (format != null) {
            return format.contains("html");
        }
        try {
            Field inner = request.getClass().getDeclaredField("req");
            inner.setAccessible(true);
            HttpMessage message = (HttpMessage) inner.get(request);
            return message.headers().get(HttpHeaderNames.ACCEPT, "").contains("text/html");
        } catch (ReflectiveOperationException | RuntimeException e) {
            logger.debug("ts-cores: the Accept header cannot be read", e);
            return false;
        }
    }

    /**
     * Runs ts_plugin.frontend.server with the server's own interpreter, as a child of this JVM and without a shell.
     *
     * @return what it wrote to stdout; its stderr goes to the log
     * @throws IOException it did not start, failed, or took longer than the given seconds; the message names the remedy
     */
    private static String ask(int seconds, String... question) throws IOException, InterruptedException {
        List<String> command = new ArrayList<>(List.of(python, "-P", "-m", "ts_plugin.frontend.server"));
        command.addAll(List.of(question));
        Process process;
        try {
            process = new ProcessBuilder(command).redirectInput(new File("/dev/null")).start();
        } catch (IOException e) {
            throw new IOException(e.getMessage() + "; set the property python to an interpreter with ts-cores", e);
        }
        try {
            CompletableFuture<String> output = drain(process.getInputStream());
            CompletableFuture<String> errors = drain(process.getErrorStream());
            if (!process.waitFor(seconds, TimeUnit.SECONDS)) {
                throw new IOException("no answer within " + seconds + " s; run it by hand: " + String.join(" ", command));
            }
            // A grandchild may hold the pipes open: what is not there a second after the end is not waited for.
            String complaint = errors.completeOnTimeout("", 1, TimeUnit.SECONDS).join().strip();
            if (process.exitValue() != 0) {
                String last = complaint.substring(complaint.lastIndexOf('\n') + 1);
                String remedy = last.contains("No module named")
                        ? "pip install the checkout or a wheel of ts-cores into the environment of " + python
                        : "run it by hand: " + String.join(" ", command);
                throw new IOException(last + " (exit status " + process.exitValue() + "); " + remedy);
            }
            complaint.lines().forEach(line -> logger.warn("ts-cores: {}", line));
            return output.completeOnTimeout("", 1, TimeUnit.SECONDS).join();
        } finally {
            process.destroyForcibly();
        }
    }

    private static CompletableFuture<String> drain(InputStream stream) {
        return CompletableFuture.supplyAsync(
                () -> {
                    try (stream) {
                        return new String(stream.readAllBytes(), StandardCharsets.UTF_8);
                    } catch (IOException e) {
                        throw new UncheckedIOException(e);
                    }
                },
                CoresEndpoint::start);
    }

    private static void start(Runnable task) {
        Thread thread = new Thread(task, "ts-cores");
        thread.setDaemon(true);
        thread.start();
    }

    private static String reason(Exception e) {
        return e.getMessage() == null ? e.toString() : e.getMessage();
    }
}
