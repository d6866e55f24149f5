import io.netty.channel.ChannelFuture;
import io.netty.channel.EventLoopGroup;
import io.prometheus.client.CollectorRegistry;
import java.io.ByteArrayOutputStream;
import java.io.PrintStream;
import java.lang.reflect.Field;
import java.util.List;
import java.util.Map;
import org.apache.commons.cli.DefaultParser;
import org.pytorch.serve.ModelServer;
import org.pytorch.serve.metrics.MetricCache;
import org.pytorch.serve.metrics.MetricManager;
import org.pytorch.serve.servingsdk.impl.PluginsManager;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.ConfigManager.Arguments;
import org.pytorch.serve.util.Connector;
import org.pytorch.serve.util.ServerGroups;
import org.pytorch.serve.util.TokenAuthorization;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * Starts TorchServe's frontend with one config.properties after the other, as ModelServer.main does. For each it prints
 * "ok" and MODEL:VERSION=WORKERS of what it loaded, or "no" and why it stopped. The first argument is the model store;
 * with that alone it prints which file it goes by here; without any it prints the names of all properties.
 */
public class StartProbe {
    public static void main(String[] words) throws Exception {
        PrintStream out = System.out;
        System.setOut(new PrintStream(new ByteArrayOutputStream()));
        for (Field field : ConfigManager.class.getDeclaredFields()) {
            field.setAccessible(true);
            boolean constant = field.getName().matches("[A-Z_]+") && field.getType() == String.class;
            if (words.length == 0 && constant) {
                out.println(field.getName() + " " + field.get(null));
            }
        }
        if (words.length == 1) {
            out.println(file(words[0]));
        }
        for (int i = 1; i < words.length; i++) {
            out.println(start(words[0], words[i]).replace('\n', ' '));
        }
        System.exit(0);
    }

    private static String file(String store) throws Exception {
        String[] words = {"-s", store, "--python", "/bin/true"};
        try {
            ConfigManager.init(new Arguments(new DefaultParser().parse(Arguments.getOptions(), words)));
            return ConfigManager.getInstance().getProperty("tsConfigFile", "none");
        } catch (NullPointerException error) {
            return "no " + error;
        }
    }

    private static String start(String store, String file) throws Exception {
        String[] words = {"-f", file, "-ncs", "-s", store, "--python", "/bin/true"};
        ModelServer server = null;
        try {
            ConfigManager.init(new Arguments(new DefaultParser().parse(Arguments.getOptions(), words)));
            ConfigManager config = ConfigManager.getInstance();
            // These are read once per JVM, which starts one server.
            set(Connector.class, "useNativeIo", config.useNativeIo());
            set(MetricCache.class, "instance", null);
            CollectorRegistry.defaultRegistry.clear();
            TokenAuthorization.init();
            PluginsManager.getInstance().initialize();
            MetricCache.init();
            server = new ModelServer(config);
            server.startRESTserver();
            server.startGRPCServers();
            if (!config.isSystemMetricsDisabled()) {
                MetricManager.scheduleMetrics(config);
            }
            StringBuilder models = new StringBuilder("ok");
            for (var name : ModelManager.getInstance().getAllModels()) {
                for (Map.Entry<String, Model> version : name.getValue().getAllVersions()) {
                    Model model = version.getValue();
                    int workers = ModelManager.getInstance().getWorkers(model.getModelVersionName()).size();
                    models.append(" " + model.getModelName() + ":" + model.getVersion() + "=" + workers);
                }
            }
            return models.toString();
        } catch (Throwable error) {
            return "no " + error;
        } finally {
            stop(server);
        }
    }

    private static void stop(ModelServer server) throws Exception {
        if (ModelManager.getInstance() != null) {
            ModelManager.getInstance().getScheduler().shutdownNow();
        }
        if (server == null) {
            return;
        }
        for (ChannelFuture closed : (List<ChannelFuture>) get(server, "futures")) {
            closed.channel().close().sync();
        }
        for (String name : new String[] {"inferencegRPCServer", "managementgRPCServer"}) {
            io.grpc.Server gRPC = (io.grpc.Server) get(server, name);
            if (gRPC != null) {
                gRPC.shutdownNow().awaitTermination();
            }
        }
        ServerGroups groups = (ServerGroups) get(server, "serverGroups");
        groups.shutdown(false);
        groups.getBackendGroup().shutdownGracefully(0, 0, java.util.concurrent.TimeUnit.SECONDS);
    }

    private static Object get(Object owner, String name) throws Exception {
        Field field = ModelServer.class.getDeclaredField(name);
        field.setAccessible(true);
        return field.get(owner);
    }

    private static void set(Class<?> owner, String name, Object value) throws Exception {
        Field field = owner.getDeclaredField(name);
        field.setAccessible(true);
        field.set(null, value);
    }
}
